"""What runs the towers: onnxruntime for a cold query and plain CPUs, torch for GPUs and everything else."""
