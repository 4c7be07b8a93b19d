"""`python -m ship_ds.cli VERB`; for launchers: `torchrun -m -- ship_ds.cli evaluate ...`."""

from ship_ds.cli import run

if __name__ == "__main__":
    run()
