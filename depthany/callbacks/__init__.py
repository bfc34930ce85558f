"""Observers: checkpoints, averaged weights, throughput, records. None of them changes what is learnt."""
