"""Runs a script under FSDP2 on CPUs, which accelerate does not: it takes FSDP's settings for GPUs alone.

`AcceleratorState` looks at them only where processes have an accelerator each (accelerate 1.15, `state.py`). Elsewhere
it trains by DDP, silently. PyTorch's own FSDP2 does run with gloo.
"""

import gc
import os
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule


init = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = with_fsdp
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    namespace = runpy.run_path(script, run_name="__main__")
    sharded = [each for each in gc.get_objects() if isinstance(each, FSDPModule)]
    print(f"{len(sharded)} sharded modules")
