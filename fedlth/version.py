"""The package's version, for those who must not import the package's public face."""

VERSION = "0.1.0"
