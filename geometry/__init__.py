# SPDX-License-Identifier: Apache-2.0
"""Cameras, meshes and surfaces; knows torch and numpy, not the networks."""
