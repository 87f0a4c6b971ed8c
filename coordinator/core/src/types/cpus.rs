//! Sets of processors, as the kernel lists them: `0-31,64-95`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// Processors beyond this are not counted: Linux's largest NR_CPUS.
const CPU_MAX: u32 = 8192;

/// A set of processors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(pub BTreeSet<u32>);

impl CpuList {
    /// Those that are in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(&self.0 & &other.0)
    }
}

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse::<u32>().ok().filter(|cpu| *cpu < CPU_MAX);
            let (Some(first), Some(last)) = (number(first), number(last)) else {
                let part: String = part.chars().take(32).collect();
                return Err(format!("{part:?} is no range of processors such as 0-31"));
            };
            all.extend(first..=last);
        }
        Ok(Self(all))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while rest.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            f.write_str(separator)?;
            write!(f, "{first}")?;
            if first < last {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_has_them() {
        for (text, shown) in [
            ("0-3,8\n", Some("0-3,8")),
            ("", Some("")),
            ("5,4,6", Some("4-6")),
            ("3-1", Some("")),
            ("0-9999999", None),
            ("a", None),
        ] {
            assert_eq!(text.parse::<CpuList>().ok().map(|list| list.to_string()).as_deref(), shown, "{text}");
        }
    }
}
