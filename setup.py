"""Packages and package data. The project's metadata is in pyproject.toml."""

from setuptools import find_packages, setup

PACK_FILES = ("*.tar.gz", "*.json", "*.safetensors", "*.md")

setup(
    packages=find_packages(include=["mulki", "mulki.*"]),
    package_data={"mulki": ["py.typed", *(f"data/embedded/**/{file}" for file in PACK_FILES)]},
)
