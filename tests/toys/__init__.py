"""Kinds from outside the package, one file a port, enabled by SHIP_DS_PLUGINS."""
