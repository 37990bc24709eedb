# SPDX-License-Identifier: Apache-2.0
"""What a network is worth, in numbers: distributions of pictures, and what avatars promise (docs/metrics.md)."""
