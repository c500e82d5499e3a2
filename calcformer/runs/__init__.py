"""Runs on disk, and the device they compute on: what training, solving, sweeps and evaluation stand on."""
