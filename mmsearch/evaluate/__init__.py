"""How well captions and pictures find each other: `metrics` (pure), `report` (values), `evaluator` (the job)."""
