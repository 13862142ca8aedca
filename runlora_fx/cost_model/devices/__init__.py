"""Devices: what this machine can do, by default, as measured, and as stored."""
