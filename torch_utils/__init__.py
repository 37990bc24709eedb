# SPDX-License-Identifier: Apache-2.0
"""Helpers on top of PyTorch that know nothing of heads: compiled ops, distribution, statistics."""
