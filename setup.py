"""Builds the package, by pyproject.toml, for tools that need a setup.py."""

from setuptools import setup

setup()
