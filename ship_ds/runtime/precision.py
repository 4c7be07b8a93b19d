"""Which file `training.deepspeed=zero2_auto` stands for, decided at each start of a run.

    config = choose_precision(config)      # zero2_bf16 where every rank multiplies in it, or zero2

A checkpoint of either goes on in the other, so that a run may move between machines.
"""

from ship_ds.config import Config, override_config
from ship_ds.console import log
from ship_ds.placement import multiplies_in_bf16
from ship_ds.runtime import ranks
from ship_ds.runtime.deepspeed_config import AUTO_CONFIGS, is_bf16, read_deepspeed_config


def choose_precision(config: Config) -> Config:
    """The config with a file in place of zero1_auto, zero2_auto or zero3_auto.

    Every rank calls it, after `ranks.start`, and all get the same. A config that names a bf16 file
    stays, with a line where the ranks' devices only imitate bf16.
    """
    name = config.training.deepspeed
    has_bf16 = all(ranks.gather_objects(multiplies_in_bf16(ranks.device())))
    if name in AUTO_CONFIGS:
        in_bf16, in_fp32 = AUTO_CONFIGS[name]
        chosen = in_bf16 if has_bf16 else in_fp32
        log(
            f"training.deepspeed={name} is {chosen} here: the ranks compute in "
            f"{'bf16' if has_bf16 else 'fp32'}"
        )
        return override_config(config, [f"training.deepspeed={chosen}"])
    if not has_bf16 and is_bf16(read_deepspeed_config(name)):
        log(
            f"training.deepspeed={name}: not every rank's device multiplies in bf16; it is "
            "imitated there, on a CPU many times more slowly than fp32: zero1_auto, zero2_auto and "
            "zero3_auto take fp32 instead"
        )
    return config
