"""Where a model folder comes from: the shipped one by name, a folder, or a hub id with a revision.

Knows no network of it. A download holds configurations, tokenizer files and safetensors, nothing that could
be code.
"""

from pathlib import Path

from safelight.engine.bundle import SHIPPED
from safelight.errors import BundleError
from safelight.models.shapes import MODEL_FOLDER

FILES = ("*.json", "*.txt", "*.safetensors")


def find_model(name: str | Path) -> Path:
    """The folder of `shapes`, of a local path, or of a hub id `owner/name`, with `@revision` to pin one.

    Raises BundleError where there is no such folder and the hub has or gives none.
    """
    text = str(name)
    if text == SHIPPED:
        return MODEL_FOLDER
    if Path(text).is_dir():
        return Path(text)
    identity, _, revision = text.partition("@")
    if text.startswith((".", "/", "~")) or identity.count("/") != 1:
        raise BundleError(
            f"{text} is no folder; name a local diffusers folder, `{SHIPPED}`, or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(identity, revision=revision or None, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise BundleError(
            f"{text} is no folder here, and the hub does not give it ({reason}); name a local folder"
        ) from fault
