"""Check an image that came in from outside: `python screen_image.py picture.png`. PNG, JPEG and WebP are
decoded.
"""

import sys
from pathlib import Path

from safelight import Detector


def main(*paths: str) -> None:
    """Print one line per file; what cannot be decoded is blocked."""
    with Detector.open("shapes") as detector:
        for path in paths:
            verdict = detector.check_image(Path(path).read_bytes())
            margins = (
                ", ".join(f"{margin:+.3f}" for margin in verdict.margins[0]) if verdict.margins else "none"
            )
            print(f"{'blocked' if verdict.blocked else 'passed':8} margins {margins}  {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
