//! Masking of payloads (RFC 6455, section 5.3); knows no frames.

/// Masks or unmasks `bytes`. The first of them is byte number `phase` (modulo 4) of its payload.
#[inline]
pub fn apply(bytes: &mut [u8], mask: [u8; 4], phase: usize) {
    // Blocks of 32 bytes, so that the compiler makes vector instructions of the inner loop.
    let mask: [u8; 4] = std::array::from_fn(|i| mask[(i + phase) % 4]);
    let word = u32::from_ne_bytes(mask);
    let wide = u64::from(word) << 32 | u64::from(word);
    let (blocks, rest) = bytes.as_chunks_mut::<32>();
    for block in blocks {
        for eight in block.as_chunks_mut::<8>().0 {
            *eight = (u64::from_ne_bytes(*eight) ^ wide).to_ne_bytes();
        }
    }
    let (words, rest) = rest.as_chunks_mut::<4>();
    for four in words {
        *four = (u32::from_ne_bytes(*four) ^ word).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_at_every_length_and_phase() {
        let mask = [0x12, 0xa5, 0x00, 0xff];
        for length in 0..200 {
            for phase in 0..8 {
                let mut bytes: Vec<u8> = (0..length).map(|i| i as u8).collect();
                let want: Vec<u8> =
                    bytes.iter().enumerate().map(|(i, b)| b ^ mask[(i + phase) % 4]).collect();
                apply(&mut bytes, mask, phase);
                assert_eq!(bytes, want, "{length} {phase}");
            }
        }
    }
}
