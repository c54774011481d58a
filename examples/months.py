"""A model that lives: three tasks, a copy of its checkpoint, and a fourth task months later.

python examples/months.py FOLDER

takes bundled pictures and the bundled start model, for a few steps of each task.
"""

import shutil
import sys
from pathlib import Path

import mulki
from mulki.data import load_sequence

FIRST = ["embedded:digits", "embedded:letters", "embedded:animals"]


def main(folder, **options):
    """Returns the last run; everything is written into `folder`."""
    folder = Path(folder)
    first = mulki.run(FIRST, logs=folder, name="first", **options)
    print(f"learned {', '.join(first.results.tasks)}: {first.metrics.last:.1f} % in the mean")

    # The checkpoint alone goes to another place. It says what it has learned, and how.
    checkpoint = shutil.copytree(first.path / "checkpoints" / "latest", folder / "elsewhere")
    model = mulki.load(checkpoint)
    later = model.learn("embedded:emoji", logs=folder, name="second")
    matrix = later.results
    for name, before, after in zip(matrix.columns, matrix.rows[0], matrix.rows[-1], strict=True):
        print(f"{name}: {before:.1f} % before, {after:.1f} % after {matrix.tasks[-1]}")

    picture = load_sequence(["embedded:digits"])[0].test.load(0)
    (said,) = later.model.predict(picture, top=3)
    print(f"a digit is most like: {', '.join(said.classes)}")
    return later


if __name__ == "__main__":
    main(sys.argv[1], preset="quick")
