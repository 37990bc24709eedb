# SPDX-License-Identifier: Apache-2.0
"""Synthetic people from the embedded head, and the bake of that head."""
