# SPDX-License-Identifier: Apache-2.0
"""The networks of EG3D and Next3D and what trains them."""
