"""What registered regressions import from this place (see the package's docstring)."""

from plw_mlflow.transforms import TERMS, Transform

__all__ = ["TERMS", "Transform"]
