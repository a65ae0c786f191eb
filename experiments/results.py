"""The tables of the experiments: CSV files beside this one, a row a run and epoch."""
import csv
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def read_rows(name):
    """The rows of experiments/NAME.csv, dicts of str and float (nan where a cell is empty); [] if there is none."""
    path = HERE / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{column: cell if column == "run" else float(cell or "nan") for column, cell in row.items()}
                for row in csv.DictReader(file)]


def write_rows(name, rows, folder=None):
    """Write NAME.csv in a folder, or in experiments/: all rows' columns, in the order in which they first occur."""
    from ddpo_min.files import atomic
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic((folder or HERE) / f"{name}.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({column: text_of(value) for column, value in row.items()})


def text_of(value):
    """A cell: six digits of a number, nothing for nan."""
    return value if isinstance(value, str) else "" if np.isnan(value) else f"{value:.6g}"


def runs_of(rows):
    """The names of the runs in the order of the file."""
    return list(dict.fromkeys(row["run"] for row in rows))


def column(rows, run, name):
    """A column of one run: array (seeds, rows of a seed), in the order of the file."""
    seeds = sorted({row["seed"] for row in rows if row["run"] == run})
    return np.array([[row.get(name, np.nan) for row in rows if row["run"] == run and row["seed"] == seed]
                     for seed in seeds])


def mean_and_error(values):
    """The mean over seeds and its standard error: values (seeds, ...)."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / len(values) ** 0.5
