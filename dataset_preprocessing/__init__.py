# SPDX-License-Identifier: Apache-2.0
"""From photos and videos to training and driving data: one command line per step."""
