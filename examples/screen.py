"""Screen a few prompts with the shipped model and say what was found."""

from safelight import Detector

PROMPTS = ["a red circle", "a white snowflake", "a yellow star", "a blue st4r"]


def main() -> None:
    """Print one line per prompt."""
    with Detector.open("shapes") as detector:
        for prompt in PROMPTS:
            verdict = detector.check(prompt)
            word = "blocked" if verdict.blocked else "passed"
            print(f"{word:8} score {verdict.score:<5.3g}, limit {verdict.threshold:.3g}  {prompt}")


if __name__ == "__main__":
    main()
