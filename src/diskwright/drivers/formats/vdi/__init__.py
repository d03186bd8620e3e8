"""vdi: VirtualBox's disk images; imports `block` only."""
