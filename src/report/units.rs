//! Sizes and times as people read them. Not for what is read back: there, `ByteSize` is exact.

/// `20Gi`, `1.5Gi`, `196Ki`: three digits at most, binary units.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // 1023.95 would be shown as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") };
    format!("{}{}", text.strip_suffix(".0").unwrap_or(&text), UNITS[unit])
}

/// `45s`, `12m03s`, `5h07m`, `3d04h`.
pub fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match seconds {
        0..=59 => format!("{seconds}s"),
        60..=3599 => format!("{minutes}m{:02}s", seconds % 60),
        3600..=86_399 => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        for (bytes, text) in [
            (0, "0"),
            (512, "512"),
            (1024, "1Ki"),
            (1536, "1.5Ki"),
            (200_704, "196Ki"),
            ((1 << 20) - 1, "1Mi"),
            (20 << 30, "20Gi"),
            (u64::MAX, "16Ei"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (723, "12m03s"), (18_420, "5h07m"), (273_600, "3d04h")]
        {
            assert_eq!(duration(seconds), text);
        }
    }
}
