"""Write the tables of docs/scaling.md anew; a test fails while they are not what this writes.

python tools/make_scaling_tables.py
"""

from pathlib import Path

from ship_ds.planner.scaling import scaling_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
START, END = "<!-- tables: python tools/make_scaling_tables.py -->", "<!-- end of tables -->"


def main() -> None:
    made = scaling_tables()
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{made}\n\n{END}{after}")
    print(f"{PAGE}: tables written")


if __name__ == "__main__":
    main()
