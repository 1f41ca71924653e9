"""What the README says runs."""

import pathlib
import re

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        assert capsys.readouterr().out.strip()


def test_the_readme_shows_every_supported_family_and_no_other():
    from jaxllm.families import FAMILIES

    listed = re.search(r"\*\*Model types\*\*: (.*?)\. \[", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert sorted(re.findall(r"\w+", listed)) == sorted(FAMILIES)
