"""Files of ds_configs/ with which two ranks take steps in worker.py, and how far the losses of each
may be from those of fp32 ZeRO-3, relative."""

TOLERANCES = {
    "cpu": 1e-6,
    "zero3": 0.0,
    "zero1_bf16": 2e-2,
    "zero2_bf16": 2e-2,
    "zero2_bf16_offload_optimiser": 2e-2,
    "zero3_bf16": 2e-2,
    "zero3_hpz": 2e-2,
    "zero3_offload_cpu": 2e-2,
}
"""All but the first two are in bf16."""
LONG = {"zero1": 1e-6, "zero2": 1e-6}
"""Left to `make soak`: "cpu" is ZeRO-2 in fp32 as well, and bf16 has each stage."""
