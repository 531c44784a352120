"""Everything is in pyproject.toml; this file keeps `python setup.py --version` and old tools working."""

from setuptools import setup


setup()
