"""Instructions to model parameters and back: a DeepSpeed-scaled trainer of SHIP (Sun et al. 2025,
arXiv 2502.02315).

    from ship_ds import Ship, UserError
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from ship_ds.console import quiet_bitsandbytes
from ship_ds.errors import UserError
from ship_ds.threads import wait_asleep

if TYPE_CHECKING:
    from ship_ds.api import Ship

# Here, since whatever imports torch's friends first is a module of this package.
quiet_bitsandbytes()
# In vLLM, whose plugin this package has (serving/vllm_plugin.py), it is vLLM's to say.
if "vllm" not in sys.modules:
    # Nothing is fetched from a hub by any of these libraries: models and data are folders. Who
    # wants otherwise in a program of his own sets the variable to 0.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Nor is a kernel of the hub run: bitsandbytes and transformers would take one from there, or
    # from its cache, wherever this package is installed and a processor or a config asks for it.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
# Here, since every program of this package comes by before it imports torch. Who has torch already
# has made up his mind.
if "torch" not in sys.modules:
    wait_asleep(os.environ)

__version__ = "0.2.0"
__all__ = ["Ship", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    """`Ship`, whose module imports torch and transformers, when it is first asked for: importing
    the package alone takes no time, and a command line may check its arguments before."""
    if name == "Ship":
        from ship_ds.api import Ship

        return Ship
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
