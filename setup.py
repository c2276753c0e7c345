"""Packaging, read from settings.ini: the package `llmeco_nb` and, inside it, the notebooks and profiles."""
from configparser import ConfigParser
from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
lines = lambda key: [line for line in cfg.get(key, "").splitlines() if line.strip()]

class Sdist(sdist):
    "A source distribution that carries settings.ini too, which this file cannot do without."
    def make_release_tree(self, base_dir, files): super().make_release_tree(base_dir, [*files, "settings.ini"])

setup(name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
      author_email=cfg["author_email"], license="Apache-2.0", license_files=["LICENSE"], url=cfg["git_url"],
      keywords=cfg["keywords"].split(), python_requires=f">={cfg['min_python']}",
      long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
      packages=[*find_packages(include=["llmeco_nb", "llmeco_nb.*"]), "llmeco_nb.nbs"], package_dir={"llmeco_nb.nbs": "nbs"},
      package_data={"llmeco_nb": ["py.typed", "deployment/guard.npz"], "llmeco_nb.nbs": ["*.ipynb", "[0-9]*_*/*.ipynb", "profiles/*/*.yaml", "records/*.json", "renamed*.tsv"]}, cmdclass={"sdist": Sdist},
      install_requires=lines("requirements"), entry_points={"console_scripts": lines("console_scripts")},
      extras_require={k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")})
