"""vpc: Microsoft's virtual hard disks (VHD); imports `block` only."""
