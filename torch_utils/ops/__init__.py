# SPDX-License-Identifier: Apache-2.0
"""Tensor operations, each a function with a reference in PyTorch and, where it pays, compiled backends."""
