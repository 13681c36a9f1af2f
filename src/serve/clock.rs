//! Dates, UTC, as answers and chat templates write them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// Seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    since_1970(time).as_secs()
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// `2026-02-03T04:05:06.789Z`.
pub(super) fn timestamp(time: SystemTime) -> String {
    let millis = since_1970(time).subsec_millis();
    format!("{}.{millis:03}Z", strftime(time, "%Y-%m-%dT%H:%M:%S"))
}

/// The time as Python's `strftime` writes it; a letter that it does not have stays as it is.
pub(super) fn strftime(time: SystemTime, format: &str) -> String {
    let seconds = seconds(time);
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let weekday = ((days + 3) % 7) as usize;
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[weekday]);
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        // `%-d` is `%d` without its zero, as glibc has it.
        let mut kind = letters.next();
        let bare = kind == Some('-');
        if bare {
            kind = letters.next();
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        text.push_str(&match kind {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('j') => format!("{:03}", day_of_year(days, year)),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('z') => "+0000".to_owned(),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        });
    }
    text
}

/// Year, month and day of a day counted from 1970-01-01, by Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>): years begin in March, so that a leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

fn day_of_year(days: u64, year: u64) -> u64 {
    let back = (0..366).take_while(|back| *back <= days && civil(days - back).0 == year).count();
    back as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values: `datetime.fromtimestamp(s, timezone.utc).strftime(...)` of Python 3.11.
    #[test]
    fn dates_are_pythons() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let all = "%Y-%m-%d %H:%M:%S %a %A %b %B %y %j %I %p %e %%";
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 Thu Thursday Jan January 70 001 12 AM  1 %"),
            (951_782_400, "2000-02-29 00:00:00 Tue Tuesday Feb February 00 060 12 AM 29 %"),
            (1_709_251_199, "2024-02-29 23:59:59 Thu Thursday Feb February 24 060 11 PM 29 %"),
            (1_735_689_599, "2024-12-31 23:59:59 Tue Tuesday Dec December 24 366 11 PM 31 %"),
            (4_102_444_800, "2100-01-01 00:00:00 Fri Friday Jan January 00 001 12 AM  1 %"),
        ] {
            assert_eq!(strftime(at(seconds), all), expected);
        }
        assert_eq!(strftime(at(0), "%-d %q %"), "1 %q %");
        assert_eq!(timestamp(at(1) + Duration::from_millis(20)), "1970-01-01T00:00:01.020Z");
    }
}
