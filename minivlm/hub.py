"""Where a checkpoint is: a folder, a Hugging Face hub id that is fetched, or the one that is shipped."""

import re
from pathlib import Path

from minivlm.errors import InputError
from minivlm.models import SHIPPED

# What a checkpoint needs; a repository's other files (pickles, ONNX graphs, pictures) are not fetched.
NEEDED = ("*.json", "*.jinja", "model*.safetensors", "tokenizer.model")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def resolve(model: str | Path | None) -> Path:
    """The folder of a checkpoint: a path, "organisation/name" or "organisation/name@revision", or None.

    None is the shipped checkpoint. The files of a hub id are fetched into huggingface_hub's cache, resumed
    where a download broke off, with a progress bar on stderr; HF_HOME, HF_HUB_OFFLINE and HF_TOKEN hold.
    Raises InputError for a folder that is not there and for an id that cannot be fetched.
    """
    if model is None:
        return _shipped()
    if not isinstance(model, str | Path):
        raise InputError(f"model: expected a folder or a hub id, found {type(model).__name__} {model!r:.80}")
    path = Path(model).expanduser()
    if model != "" and path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{model}: a file, expected the folder of a checkpoint")
    # "weights/other" could be either: where a folder `weights` exists it is taken for a path.
    is_path = isinstance(model, Path) or Path(path.parts[0] if path.parts else ".").is_dir()
    if is_path or not HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such folder, expected one or a hub id such as organisation/name")
    return _fetch(*model.split("@", 1))


def _shipped() -> Path:
    """In a wheel the weights lie inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    for weights in (package / "weights", package.parent / "weights"):
        if (weights / SHIPPED).is_dir():
            return weights / SHIPPED
    raise InputError(f"{package}: found no weights/{SHIPPED} in it or beside it, expected the shipped checkpoint")


def _fetch(name: str, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(NEEDED), ignore_patterns=["*/*"])
    except (HTTPError, HFValidationError, OSError) as error:
        cause = error  # "not in the cache" says less than why the hub was not reached
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            cause = error.__cause__
        reason = " ".join(str(cause).split())[:160]
        raise InputError(
            f"{name}: not fetched from the hub ({type(cause).__name__}: {reason}); "
            "give the path of a folder to use a checkpoint that is on this machine"
        ) from None
    return Path(folder)
