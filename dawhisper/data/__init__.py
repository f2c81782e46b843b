"""What training reads: manifests, corpora, targets, batches."""
