"""Write the API reference of every public name as a site: `python docs/api.py FOLDER` (needs the extra `docs`)."""

import sys
from pathlib import Path

import pdoc

import gm_probe

for name in gm_probe.__all__:
    setattr(
        gm_probe, name, getattr(gm_probe, name)
    )  # pdoc looks for what is there, not for what is asked for
pdoc.render.configure(math=True)
pdoc.pdoc("gm_probe", output_directory=Path(sys.argv[1]))
