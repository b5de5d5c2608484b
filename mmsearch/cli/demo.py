"""`mmsearch demo`: true results on real photos within a minute of installing.

The photos are sample pictures of scikit-image. Its folder is found without importing it, which would
load SciPy for nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli import options
from mmsearch.cli.hits import print_table
from mmsearch.cli.index import summary
from mmsearch.cli.places import home
from mmsearch.cli.progress import Bar
from mmsearch.cli.terminal import emit, guarded, say
from mmsearch.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from mmsearch.types import BuildReport

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
QUERIES = ("a cat", "a cup of coffee", "a rocket ready for launch")
SHOWN = 3


@guarded(interrupted="interrupted: run it again to go on where it stopped.")
def demo(
    ctx: typer.Context,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the index goes [default: indexes/demo].")
    ] = None,
    device: options.OnDevice = options.Device.AUTO,
) -> None:
    """Index a dozen sample photos and run three queries."""
    photos = sample_photos()
    target = Path(out) if out else home() / "demo"
    with Bar("indexing") as bar:
        done: BuildReport = ctx.obj.build(photos, target, device=device.value, progress=bar)
    say(f"photos: {Path(photos[0]).parent}")
    for line in summary(done):
        say(line)
    with ctx.obj.open(target, device=device.value) as searcher:
        for query in QUERIES:
            emit(f'\n"{query}"')
            print_table(searcher.search_text(query, k=SHOWN), names_only=True)
    say('Now yours: mmsearch index ./photos, then mmsearch query "a dog on a beach"')


def sample_photos() -> list[str]:
    """Paths of the sample photos; `MissingExtraError` without scikit-image."""
    package = importlib.util.find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("demo photos", package="scikit-image", extra="demo")
    folder = Path(package.submodule_search_locations[0]) / "data"
    photos = [str(folder / name) for name in PHOTOS if (folder / name).is_file()]
    if not photos:
        raise InputError(str(folder), expected="scikit-image's sample photos", got="none", do="Reinstall scikit-image.")
    return photos
