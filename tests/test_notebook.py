"""docs/notebook.ipynb: its cells run one after the other, on a CPU with the smallest sizes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebook.ipynb"
ROOT = NOTEBOOK.parent.parent
SMALL = "--image-size 64 --steps 2 --bank 1 --hidden 32 --heads 2 --mlp 32 --device cpu"


def cells():
    """(tags, source) of the code cells."""
    content = json.loads(NOTEBOOK.read_text())
    found = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in found]


class Notebook:
    """What a notebook does with a cell: Python with lines `!command $NAME`."""

    def __init__(self, folder):
        self.names, self.folder, self.ran = {"shell": self.shell}, folder, []

    def run(self, source):
        source = re.sub(r"^( *)!(.*)$", r"\1shell(r'''\2''')", source, flags=re.M)
        exec(compile(source, NOTEBOOK.name, "exec"), self.names)

    def shell(self, line):
        """The command with its $NAMES replaced; python is this one, the script that of the repository."""
        line = re.sub(r"\$(\w+)", lambda name: str(self.names[name[1]]), line)
        words = line.split()
        assert words[0] == "python"
        if words[1].endswith(".py"):
            words[1] = str(ROOT / words[1])
        done = subprocess.run([sys.executable, *words[1:]], cwd=self.folder, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        self.ran.append(words)


def test_the_cells_run(tiny_data, tmp_path, monkeypatch):
    """All but the installation and the long check of the kernels; then the second part again, which resumes."""
    monkeypatch.chdir(tmp_path)
    notebook = Notebook(tmp_path)
    notebook.run("import os")  # of the cell that clones
    given = {
        'OPTIONS = ""\n': f'OPTIONS = "--data {tiny_data} {SMALL}"\n',
        '"mvtec", ""': f'"{tiny_data}", "{tiny_data.parent}"',
    }
    for tags, source in cells():
        if {"setup", "long"} & set(tags):
            continue
        source += "\n"
        for old, new in given.items():
            if source.startswith(("OPTIONS", "NAME")):
                source = source.replace(old, new)
        if "--data $NAME" in source:
            source = source.replace("$OPTIONS", SMALL)
        notebook.run(source)
    scripts = [words[1] for words in notebook.ran]
    assert scripts == [str(ROOT / "onenip.py"), str(ROOT / "onenip.py"), "-m"]
    assert (tmp_path / "runs" / "onenip-mvtec" / "run.html").is_file()
    assert notebook.names["result"]["method"] == "onenip"


def test_setup_is_python():
    """The cells that a test cannot run compile, and name files that are there."""
    for tags, source in cells():
        if {"setup", "long"} & set(tags):
            compile(re.sub(r"^( *)!.*$", r"\1pass", source, flags=re.M), NOTEBOOK.name, "exec")
    text = "\n".join(source for _, source in cells())
    for name in re.findall(r"-r (\S+)", text):
        assert (ROOT / name).is_file()
    for name in re.findall(r"python -m (kernels\.\w+|common\.\w+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file()


def test_no_output_is_stored():
    """The notebook is thin: no outputs, and no function or class of its own."""
    content = json.loads(NOTEBOOK.read_text())
    for cell in content["cells"]:
        assert not cell.get("outputs")
        assert not re.search(r"^(def|class) ", "".join(cell["source"]), flags=re.M)
