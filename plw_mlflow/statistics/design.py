"""What registered regressions import from this place (see the package's docstring)."""

from plw_mlflow import transforms
from plw_mlflow.transforms import TERMS

__all__ = ["TERMS", "Transform"]


def Transform(name: str, plws: tuple[float, ...]) -> transforms.Transform:
    """The transform that had this name then."""
    return transforms.Transform({"power": "w_p", "none": "plw"}.get(name, name), plws)
