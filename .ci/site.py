"""A hook of mkdocs: the site has the repository's own layout, so that a relative link works in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = ("*.md", "LICENSE", "CITATION.cff", "docs/**/*", "benchmarks/**/*", "examples/**/*", ".ci/run")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by those of the repository that pages link to, each at its own path."""
    theme = [file for file in files if file.inclusion.is_excluded() or file.src_dir != config.docs_dir]
    found = {path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()}
    ours = [path.relative_to(ROOT).as_posix() for path in sorted(found) if "__pycache__" not in path.parts]
    return Files([*theme, *(File.generated(config, name, abs_src_path=str(ROOT / name)) for name in ours)])
