# SPDX-License-Identifier: Apache-2.0
"""From photographs to training and driving data: faces found, crops, cameras, meshes and labels, a step a module."""
