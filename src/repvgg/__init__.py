"""RepVGG: networks that train with many branches and run as plain 3×3 convolution + ReLU.

The public names, each imported when it is first used, so that `import repvgg` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from repvgg.branches import Branch as Branch
    from repvgg.branches import MultiBranchBlock as MultiBranchBlock
    from repvgg.branches import repvgg_block as repvgg_block
    from repvgg.checkpoint import load as load
    from repvgg.checkpoint import load_weights as load_weights
    from repvgg.checkpoint import save as save
    from repvgg.costs import Cost as Cost
    from repvgg.costs import cost as cost
    from repvgg.engine import Engine as Engine
    from repvgg.engine import compile as compile
    from repvgg.errors import InputError as InputError
    from repvgg.model import RepVGG as RepVGG
    from repvgg.model import create_model as create_model
    from repvgg.preprocessing import Preprocessing as Preprocessing
    from repvgg.reparam import Conversion as Conversion
    from repvgg.reparam import convert as convert
    from repvgg.reparam import reparameterize as reparameterize
    from repvgg.segmentation.pspnet import PSPNet as PSPNet
    from repvgg.spec import Layer as Layer
    from repvgg.spec import Spec as Spec
    from repvgg.spec import list_models as list_models
    from repvgg.verification import Agreement as Agreement
    from repvgg.verification import verify as verify

_HOME = {
    "branches": ("Branch", "MultiBranchBlock", "repvgg_block"),
    "checkpoint": ("load", "load_weights", "save"),
    "costs": ("Cost", "cost"),
    "engine": ("Engine", "compile"),
    "errors": ("InputError",),
    "model": ("RepVGG", "create_model"),
    "preprocessing": ("Preprocessing",),
    "reparam": ("Conversion", "convert", "reparameterize"),
    "segmentation.pspnet": ("PSPNet",),
    "spec": ("Layer", "Spec", "list_models"),
    "verification": ("Agreement", "verify"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'repvgg' has no attribute {name!r}")
    return getattr(import_module(f"repvgg.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
