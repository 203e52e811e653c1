"""Generate an image where the request passes, and save it: `python generate.py "a red circle" circle.png`."""

import sys
from pathlib import Path

from PIL import Image

from safelight import Generator


def main(prompt: str = "a blue heart next to a white square", path: str = "out/heart.png") -> None:
    """Detection, then 25 steps with guidance, then the image checker."""
    with Generator.open("shapes") as generator:
        made = generator.generate(prompt, steps=25, seed=1)
    if made.image is None:
        blocked = made.image_verdict or made.verdict
        raise SystemExit(f"blocked: {blocked.reason}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(made.image).save(path)
    print(f"{prompt!r} is in {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
