# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of a triplane (Chan et al. 2022, section 4.3; Mildenhall et al. 2020): torch and its ops alone."""
