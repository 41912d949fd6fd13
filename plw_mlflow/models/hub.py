"""The hub: whether it has a model or a tokenizer, which is asked before anything large is imported.

What it answers is kept by its client, so a file that is downloaded here is not downloaded again when the model is read.
"""

from __future__ import annotations

from plw_mlflow.errors import Unreachable, UserError, first_line, reason
from plw_mlflow.models.location import locate

FILES = {"model": "config.json", "tokenizer": "tokenizer_config.json"}  # which each kind has; a tokenizer may lack it


def check(kind: str, name: str) -> None:
    """Raise an error unless a name means a folder, or something on the hub that this machine can have.

    kind: model or tokenizer.

    Raises UserError where the hub does not have it, or not for this user, and Unreachable where the hub does not answer
    and nothing that was downloaded earlier can be used. Before that, the hub's client asks again for half a minute.
    """
    place = locate(name)
    if place.is_folder:
        return
    from huggingface_hub import errors, hf_hub_download

    what = f"{kind} {place.path!r}"
    try:
        hf_hub_download(place.path, FILES[kind], revision=place.revision)
    except errors.LocalEntryNotFoundError as error:  # it was not downloaded earlier, and the hub gives no answer
        cause = error.__cause__ or error
        if isinstance(cause, errors.OfflineModeIsEnabled):
            raise UserError(
                f"{what} is not among what was downloaded, and the hub is not to be asked (HF_HUB_OFFLINE)"
            ) from None
        raise Unreachable(
            f"{what} is not among what was downloaded, and the hub cannot be asked: {reason(cause)}"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"the hub gives {what} only to those who have accepted its terms; accept them there, and put your token "
            f"into HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no {what} for you; if it is a private one, put your token into HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"the hub's {what} has no revision {place.revision!r}") from None
    except errors.EntryNotFoundError:
        if kind == "model":
            raise UserError(f"{place.path!r} on the hub holds no model: it has no {FILES[kind]}") from None
    except (OSError, ValueError) as error:  # among them a name that the hub's client does not take for one
        raise UserError(f"{what} cannot be had from the hub: {first_line(error)}") from None
