"""What a transformer computes between its products, with its gradients: fused where that pays."""
