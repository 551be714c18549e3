"""The long description that a package index shows: README.md without what only a checkout has.

Everything else about the package stands in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"^!\[[^]]*\]\((?!http)[^)]*\)\n\n", "", readme, flags=re.MULTILINE)  # pictures
readme = re.sub(r"\[([^]]*)\]\((?!http|#)[^)]*\)", r"\1", readme)  # links to files

setup(long_description=readme, long_description_content_type="text/markdown")
