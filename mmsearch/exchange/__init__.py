"""Vectors that other programs made, brought into an index, and those of an index handed to other programs.

    from mmsearch.exchange import export_vectors, import_vectors

    import_vectors(["laion/"], "indexes/laion", model="openai/clip-vit-base-patch32")
    export_vectors("indexes/laion", "shared/", format="parquet")

Which files are read is said in `sources`, which are written in `exporting`.
"""

from mmsearch.exchange.exporting import export_vectors as export_vectors
from mmsearch.exchange.importing import import_vectors as import_vectors
from mmsearch.exchange.reports import ExportReport as ExportReport
from mmsearch.exchange.reports import ImportReport as ImportReport

__all__ = ["ExportReport", "ImportReport", "export_vectors", "import_vectors"]
