"""Training: SimCLR with every head of the paper, DirectCLR (arXiv 2110.09348, sections 3 and 6), and other losses.

data       images with labels: folders, zips, tar shards, arrays;  loader  their batches, the same for any workers
network    backbone, head and classifier as one, and one step's gradients;  losses;  optim  LARS, the schedule
parallel   several processes as one
train      the loop;  online  what is measured on the way;  run  the RUN folder: log, spectra, saves
probes     the paper's linear evaluation
relaxation the last map alone, behind a frozen trunk, until it stands still
"""
