"""Rows in, spectrum out: the covariance's singular values, of arrays, networks and layers; and their comparison."""

from collapse.spectra.result import METRICS, SPECTRA, Spectrum, load_results

__all__ = ["METRICS", "SPECTRA", "Spectrum", "load_results"]
